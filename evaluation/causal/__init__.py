"""The causal evidence that latents matter: interventions on a trace, statistics of their effects, the card."""
