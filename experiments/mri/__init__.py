"""The MRI study: codecs on several backbones, other networks and classical methods."""
