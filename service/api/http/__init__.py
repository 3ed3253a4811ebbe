"""What every face of the API shares: access, bodies, queries, streams, problems, other workers' answers."""
