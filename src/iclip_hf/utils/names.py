"""Names and defaults that options take. This module imports nothing, so that the help of a command does not load torch."""

# Explanation methods: for each its label in the demo, and the module and class in `iclip_hf.explainers`.
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
    "maskclip": ("MaskCLIP", "maskclip:MaskCLIP"),
    "sclip": ("SCLIP", "sclip:SCLIP"),
    "clearclip": ("ClearCLIP", "clearclip:ClearCLIP"),
    "naclip": ("NACLIP", "naclip:NACLIP"),
    "proxyclip": ("ProxyCLIP", "proxyclip:ProxyCLIP"),
    "random": ("Random, independent of image and text", "random_map:RandomMap"),
}
# The group of entry points by which other packages add methods: a name, and module and class.
METHOD_GROUP = "iclip_hf.explainers"
# Measures of an evaluation: for each its module and class in `iclip_hf.evaluation.measures`; by the tasks of `iclip evaluate`.
TASKS = {
    "interpretability": {
        "mAP": "average_precision:AveragePrecision",
        "mMIoU": "mmiou:MMIoU",
        "mFMB": "mfmb:MFMB",
        "text_contrast": "text_contrast:TextContrast",
        "stuff_contrast": "stuff_contrast:StuffContrast",
        "presence": "presence:Presence",
    },
    "segmentation": {"segmentation": "segmentation:Segmentation"},
    "faithfulness": {
        "deletion_insertion": "deletion_insertion:DeletionInsertion",
        "max_sensitivity": "max_sensitivity:MaxSensitivity",
        "randomization": "randomization:Randomization",
        "pointing_game": "pointing_game:PointingGame",
    },
}
MEASURES = {name: place for measures in TASKS.values() for name, place in measures.items()}
# Poolings whose channels are compared.
POOLINGS = ("class_token", "average", "max", "own")
DTYPES = ("float32", "bfloat16", "float16")
# Colours of maps, see `iclip_hf.figures.colors`; the first is the default.
COLORMAPS = ("heat", "cividis", "jet")
