"""What a run tells: console, metrics, images, the report page."""
