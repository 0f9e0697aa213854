"""Other people's frameworks, met where they are. Nothing here is imported by the rest of the package."""
