"""The configuration: its schema, and the strict reader that turns YAML into it."""
