"""Adapters to other frameworks. The rest of the package does not import them, apart from the commands that need one."""
