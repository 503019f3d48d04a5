"""A ComfyUI workflow as its editor saves it: the graph of the API format, arranged on a canvas (torch-free).

Unlike the API format it has positions, and the values of a node without their names, in the order of its widgets. Each
column holds the nodes at the same distance from the inputs.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zimage_train.diffusion.comfyui import Node

VERSION = 0.4
GAP = 80.0
"""Space between nodes, px, which includes the title that the editor draws above a node's position."""
SEED_CONTROL = "fixed"
"""Value of the widget that ComfyUI adds after a seed: the next run draws the same image again."""


@dataclass(frozen=True)
class NodeType:
    """What ComfyUI defines for a type of node."""

    links: dict[str, str]
    """Input that is a link -> its type."""
    widgets: tuple[str, ...]
    """Inputs that are values, in the order of the definition."""
    outputs: tuple[str, ...]
    """Type of each output; its name is the same."""
    size: tuple[float, float]
    """Width and height on the canvas, px."""


NODE_TYPES: dict[str, NodeType] = {
    "UNETLoader": NodeType({}, ("unet_name", "weight_dtype"), ("MODEL",), (340, 100)),
    "CLIPLoader": NodeType({}, ("clip_name", "type", "device"), ("CLIP",), (340, 130)),
    "VAELoader": NodeType({}, ("vae_name",), ("VAE",), (340, 70)),
    "LoraLoaderModelOnly": NodeType({"model": "MODEL"}, ("lora_name", "strength_model"), ("MODEL",), (400, 100)),
    "ModelSamplingAuraFlow": NodeType({"model": "MODEL"}, ("shift",), ("MODEL",), (300, 70)),
    "CLIPTextEncode": NodeType({"clip": "CLIP"}, ("text",), ("CONDITIONING",), (400, 200)),
    "ConditioningZeroOut": NodeType({"conditioning": "CONDITIONING"}, (), ("CONDITIONING",), (300, 40)),
    "EmptySD3LatentImage": NodeType({}, ("width", "height", "batch_size"), ("LATENT",), (340, 130)),
    "KSampler": NodeType(
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
        ("LATENT",),
        (320, 290),
    ),
    "VAEDecode": NodeType({"samples": "LATENT", "vae": "VAE"}, (), ("IMAGE",), (220, 60)),
    "SaveImage": NodeType({"images": "IMAGE"}, ("filename_prefix",), (), (440, 520)),
}
"""The nodes that `comfyui_workflow` uses, as ComfyUI's nodes.py, nodes_sd3.py and nodes_model_advanced.py define them;
the sizes are ours."""


def canvas_workflow(nodes: dict[str, Node]) -> dict[str, Any]:
    """Return the workflow that `comfyui_workflow` made in the format of the editor."""
    links: list[list[Any]] = []
    inputs_of: dict[str, list[dict[str, Any]]] = {number: [] for number in nodes}
    links_from: dict[tuple[str, int], list[int]] = {}
    for number, node in nodes.items():
        for slot, (name, kind) in enumerate(NODE_TYPES[node["class_type"]].links.items()):
            source, source_slot = node["inputs"][name]
            link = len(links) + 1
            links.append([link, int(source), source_slot, int(number), slot, kind])
            links_from.setdefault((source, source_slot), []).append(link)
            inputs_of[number].append({"name": name, "type": kind, "link": link})
    columns = _columns(nodes)
    positions = _positions(nodes, columns)
    order = sorted(nodes, key=lambda number: (columns[number], int(number)))
    placed = []
    for number, node in nodes.items():
        kind = NODE_TYPES[node["class_type"]]
        outputs = []
        for slot, output in enumerate(kind.outputs):
            outgoing = links_from.get((number, slot), [])
            outputs.append({"name": output, "type": output, "links": outgoing, "slot_index": slot})
        placed.append(
            {
                "id": int(number),
                "type": node["class_type"],
                "title": node["_meta"]["title"],
                "pos": list(positions[number]),
                "size": list(kind.size),
                "flags": {},
                "order": order.index(number),
                "mode": 0,
                "inputs": inputs_of[number],
                "outputs": outputs,
                "properties": {"Node name for S&R": node["class_type"]},
                "widgets_values": _widget_values(node, kind),
            }
        )
    return {
        "last_node_id": max(map(int, nodes)),
        "last_link_id": len(links),
        "nodes": placed,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": VERSION,
    }


def canvas_path(lora: Path) -> Path:
    """Return the path of the workflow in the format of the editor, beside an exported LoRA."""
    return lora.with_suffix(".workflow.json")


def _widget_values(node: Node, kind: NodeType) -> list[Any]:
    values: list[Any] = []
    for widget in kind.widgets:
        values.append(node["inputs"][widget])
        if widget == "seed":
            values.append(SEED_CONTROL)
    return values


def _columns(nodes: dict[str, Node]) -> dict[str, int]:
    """Return number -> column: one more than the furthest column that the node has a link from."""
    columns: dict[str, int] = {}

    def column(number: str) -> int:
        if number not in columns:
            sources = [value[0] for value in nodes[number]["inputs"].values() if isinstance(value, list)]
            columns[number] = 1 + max((column(source) for source in sources), default=-1)
        return columns[number]

    for number in nodes:
        column(number)
    return columns


def _positions(nodes: dict[str, Node], columns: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Return number -> left and top of each node, px."""
    widths: Counter[int] = Counter()
    for number, node in nodes.items():
        widths[columns[number]] = max(widths[columns[number]], int(NODE_TYPES[node["class_type"]].size[0]))
    lefts = [0.0]
    for index in sorted(widths):
        lefts.append(lefts[-1] + widths[index] + GAP)
    tops: dict[int, float] = {}
    positions: dict[str, tuple[float, float]] = {}
    for number, node in nodes.items():
        index = columns[number]
        top = tops.get(index, 0.0)
        positions[number] = (lefts[index], top)
        tops[index] = top + NODE_TYPES[node["class_type"]].size[1] + GAP
    return positions
