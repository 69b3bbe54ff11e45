"""Names of the explanation methods. Imports nothing, so that the help of a command does not load torch."""

# Explanation methods: for each its label in the demo, and the module and class here.
METHODS = {
    "itsm": ("Similarity map (ITSM)", "itsm:ITSM"),
    "reversed_itsm": ("Reversed similarity map", "itsm:ReversedITSM"),
    "attention": ("Attention, the same for every text", "attention:Attention"),
    "attention_affinity": ("Attention spread by affinity, the same for every text", "attention:AttentionAffinity"),
    "grad_cam": ("Grad-CAM", "grad_cam:GradCAM"),
    "grad_eclip": ("Grad-ECLIP", "grad_eclip:GradECLIP"),
    "legrad": ("LeGrad", "legrad:LeGrad"),
    "bi_modal": ("Bi-modal relevance", "bi_modal:BiModal"),
    "clip_surgery": ("CLIP Surgery", "clip_surgery:CLIPSurgery"),
    "gem": ("GEM", "gem:GEM"),
    "maskclip": ("MaskCLIP", "last_block:MaskCLIP"),
    "sclip": ("SCLIP", "last_block:SCLIP"),
    "clearclip": ("ClearCLIP", "last_block:ClearCLIP"),
    "naclip": ("NACLIP", "last_block:NACLIP"),
    "proxyclip": ("ProxyCLIP", "proxyclip:ProxyCLIP"),
    "random": ("Random, independent of image and text", "random_map:RandomMap"),
}
# The group of entry points by which other packages add methods: a name, and module and class.
METHOD_GROUP = "iclip_hf.explainers"
