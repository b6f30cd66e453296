"""Clusters to measure: nodes on hosts of their own, and on each a process that reads as a rank of a job does."""
