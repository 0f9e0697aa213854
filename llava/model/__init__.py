"""The model: vision tower, projector, token selection, LLM. Import the parts by name; this file imports none."""
