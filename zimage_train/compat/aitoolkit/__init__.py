"""Jobs of AI Toolkit, read as configs."""
