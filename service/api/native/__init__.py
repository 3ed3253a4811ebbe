"""The native API: sessions, turns and chat."""
