"""Study 1: a sparse shift in SAE space makes a frozen model answer as a demographic group does.

Modules in the order of the work: `settings`, `fit` (training a shift), `experiment` (a model with a
survey), `methods` (shifts in every space, chosen and judged), `baselines` and `readers` (what they
have to beat), `generalise` (groups never trained on), `meaning` (what a shift is made of), `study`
(all of it for the runner), `tables` and `findings` (what was found). Prompts, cached residuals,
targets and scores stand in `surveys`, spaces and saved shifts in `bases` and `shifts`.
"""
