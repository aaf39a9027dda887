"""What is trained from what: the plan of a run, its workdir, and the provenance of each stage."""
