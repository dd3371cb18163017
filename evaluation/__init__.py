"""Evaluation of latent visual reasoning: benchmarks, interventions on latents, statistics, figures."""
