"""Images and captions: found, read, sized and put in order, without torch."""
