"""Surveys: questions, groups and answers; public and own data; splits; crossed attributes."""
