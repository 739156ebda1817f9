"""Study 2: predict, from statistics that need no steering, how cleanly a feature of an SAE steers.

Paper: E. Duan, "Pre-Intervention Prediction of Sparse Autoencoder Steering Side Effects",
arXiv 2606.08365. Modules in the order of the work: `corpus` (contexts), `pool` (eligible features),
`labels` (what steering does), `predictors` (what is known before), `prediction` (one from the
other), `forecasters` (forecasts beyond the paper), `screening` (choosing features by prediction),
`screen` (one SAE through all of it), `analysis` (tables of one SAE), `study` (all SAEs and seeds),
`tables` and `findings` (what was found), `ranking` and `card` (any SAE of any model).
"""
