"""What a run tells: console, metrics, pictures, the report page."""
