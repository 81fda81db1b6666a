"""How often alignment, rules and verification are right."""
