"""Screening features of any SAE of any model: what steering each does, and what foretells it.

Modules in the order of the work: `settings`, `pool` (eligible features), `labels` (what steering
does), `predictors` (what is known before), `ridge` (one from the other), `forecasters` (forecasts
that steer no feature), `screen` (one SAE through all of it), `ranking` (all features of an SAE,
`sae_research.screen_features`) and `card` (one feature).
"""
