"""Conversion of the jobs of AI Toolkit (ostris/ai-toolkit)."""
