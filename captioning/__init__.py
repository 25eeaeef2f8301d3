"""What the scripts stand on: annotations and images in, models and captions out."""

HUB_MODEL = "Salesforce/blip-image-captioning-base"  # the pretrained captioner that scripts take by default
