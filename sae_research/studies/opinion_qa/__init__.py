"""Study 1: a sparse shift in SAE space that makes a frozen model answer a survey as a demographic
group does.
"""
