"""What has work now: sessions with open turns, and how they come, go and are stopped."""
