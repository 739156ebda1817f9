"""A first look at a real model: what every study on it rests on."""
