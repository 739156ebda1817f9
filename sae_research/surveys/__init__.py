"""Surveys: questions, groups and answers; reading public and own data; splits; crossed attributes."""
