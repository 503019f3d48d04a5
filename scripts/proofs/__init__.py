"""The proof table: for each setting a run in which it changes a number as predicted, and its neutral value."""
