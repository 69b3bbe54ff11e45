"""The formats of label masks on disk, one in each module. A format reads a folder into [`~sample.Annotations`]."""
