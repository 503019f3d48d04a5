"""Hubs that model files are downloaded from."""
