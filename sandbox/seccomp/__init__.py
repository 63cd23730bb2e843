"""System call filters (profiles as data files, compiled by libseccomp) and Landlock beside them."""
