"""How fast is it? Times and memory, measured side by side in one process."""
