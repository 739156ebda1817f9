"""Study 2: predict, from statistics that need no steering, how cleanly a feature of an SAE steers.

Paper: E. Duan, "Pre-Intervention Prediction of Sparse Autoencoder Steering Side Effects",
arXiv 2606.08365. `sae_research.screening` steers and labels features; here, in the order of the
work: `corpus` (contexts), `prediction` (labels from predictors), `selection` (choosing features by
prediction), `analysis` (tables of one SAE), `study` (all SAEs and seeds), `tables` and `findings`
(what was found).
"""
