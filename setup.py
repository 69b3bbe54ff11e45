import warnings
from pathlib import Path

from setuptools import find_packages, setup


# Setuptools warns of folders in the working directory that have the package's name. The package is in src, so that no
# folder has it.
warnings.filterwarnings("ignore", "Editable installation")

extras = {
    # `iclip train`
    "train": [
        "accelerate>=1.10",
        "datasets>=5.2",
        "tensorboard>=2.15",
    ],
    # `iclip evaluate` and the metric modules
    "eval": ["accelerate>=1.10", "evaluate>=0.4.6", "pycocotools>=2.0.8", "scikit-learn>=1.5"],
    # Gradio apps, and their example photographs
    "demo": ["gradio>=6.24", "scikit-image>=0.25"],
    # `iclip export --format onnx`, and the models that it writes
    "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"],
    # models of open_clip in the explainers; the name has a hyphen, because pip before 23.3 finds no other
    "open-clip": ["open_clip_torch>=3.0"],
    # `make docs`
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings>=1.0,<2", "mkdocstrings-python>=2.0,<3"],
}
extras["dev"] = sorted(
    {requirement for group in extras.values() for requirement in group}
    | {
        "hypothesis>=6.100",
        "ipykernel>=6.29",
        "matplotlib>=3.8",  # the pictures of benchmarks
        "nbclient>=0.10",
        "pillow-heif>=0.22",  # HEIC, an option of any installation
        "playwright>=1.65",
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "setuptools>=77",
        "torchmetrics>=1.6",
        "transformers-mlinter==0.1.5",
    }
)
# In addition to dev: the libraries that the benchmarks compare with
extras["bench"] = ["captum>=0.8", "grad-cam>=1.5"]

setup(
    name="iclip-hf",
    version="0.2.0.dev0",
    description="Contrastive image-text models that explain themselves: ICLIP for Hugging Face Transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.10",
    # The wheel also contains what `iclip install-metrics`, `iclip init` and the model card read.
    package_dir={
        "": "src",
        "iclip_hf.evaluate_metrics": "evaluate_metrics",
        "iclip_hf.hub_configs": "hub_configs",
    },
    packages=[*find_packages("src"), "iclip_hf.evaluate_metrics", "iclip_hf.hub_configs"],
    package_data={
        "iclip_hf": [
            "py.typed",
            "plots/tower.*",
            "plots/*.html",
            "demo/*.js",
            "web/page/*",
            "backends/*.safetensors",
            "data/papers/*.yaml",
            "plots/fonts/*",
        ],
        "iclip_hf.evaluate_metrics": ["*/*.py", "*/*.md"],
        "iclip_hf.hub_configs": ["*/*.json", "*/*.yaml", "*/*.txt", "../model_card.md"],
    },
    install_requires=[
        "httpx>=0.27",
        "huggingface_hub>=2.0",
        "jinja2>=3.1",
        "numpy>=1.26",
        "pillow>=11.0",
        "pyyaml>=6.0.2",
        "safetensors>=0.5",
        "timm>=1.0.15",
        "torch>=2.10",
        "torchvision>=0.25",
        "tqdm>=4.66",
        "transformers>=5.20",
        "wrapt>=1.17",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["iclip=iclip_hf.cli:main"]},
)
