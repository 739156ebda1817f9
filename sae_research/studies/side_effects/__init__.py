"""Study 2: predict, from statistics that cost no steering, how cleanly a feature of an SAE will steer.

Paper: E. Duan, "Pre-Intervention Prediction of Sparse Autoencoder Steering Side Effects", arXiv 2606.08365. Modules
in the order of the work: `corpus` (contexts), `pool` (eligible features), `labels` (what steering does), `predictors`
(what can be known before), `models` (predicting one from the other), `forecasters` (free forecasts beyond the paper),
`screening` (choosing features by prediction), `study` (one dictionary through all of it), `card` (the ranked table of
any SAE and the feature card).
"""
