"""The two caching runs, and contact sheets of what they would cache."""
