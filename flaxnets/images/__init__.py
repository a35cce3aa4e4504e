"""Images: finding, decoding and preparing them as weights expect."""
