"""Engines behind ports.Engine: fake (deterministic, no model) and transformers (any Hugging Face causal LM)."""
