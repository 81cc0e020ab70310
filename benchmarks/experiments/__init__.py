"""Training experiments as TOML files, and what publishes their results."""
