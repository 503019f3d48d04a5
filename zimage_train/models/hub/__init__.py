"""Hubs from which model files are downloaded."""
