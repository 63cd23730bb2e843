"""A module of the plugin's own."""

VALUE = 42
