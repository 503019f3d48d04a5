"""Claims of this project, each measured on the machine that `prove` runs on."""
