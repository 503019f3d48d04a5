"""What a run costs on rented cards, with the volume and the machine that fills it: predicted (torch-free)."""

from zimage_train.config.schema import Config
from zimage_train.config.variants import DOWNLOAD_GB
from zimage_train.planning import forecast, gpus
from zimage_train.planning.gpus import GPU_SPECS, DeviceLimits
from zimage_train.planning.preflight import RunSpec
from zimage_train.planning.pricing import Prices


def download_gb(config: Config) -> float:
    """What the published weights take that `config` trains on and draws with; local ones are counted too."""
    model = config.model
    transformers = DOWNLOAD_GB["transformer"] * (2 if config.sample.compare_on else 1)
    adapter = DOWNLOAD_GB["adapter"] if model.adapter else 0.0
    return transformers + DOWNLOAD_GB["text encoder"] + DOWNLOAD_GB["VAE"] + adapter


def cost_lines(checked: RunSpec, prices: Prices) -> list[str]:
    """The volume, the machine that fills it, and each card by what it costs in all; a card that is too small last."""
    size = download_gb(checked.config)
    filling = size * 1000 / prices.megabytes_per_second / 3600
    once = filling * prices.cpu_pod
    found = [
        f"costs in {prices.currency} at the prices of {prices.date}, times predicted from data sheets:",
        f"  to fill the volume once: {size:.1f} GB, {forecast.format_hours(filling * 3600)} of a CPU pod at "
        f"{prices.cpu_pod:g}/h: {once:.2f}",
        f"  to keep {prices.volume_gb:g} GB for {prices.days:g} days at {prices.volume:g}/GB a month: "
        f"{prices.keeping:.2f}",
        f"  {'card':8}{'an hour':>9}{'start':>8}{'training':>13}{'GPU':>9}{'in all':>9}",
    ]
    rows, small = [], []
    for name, price in prices.gpus.items():
        card = GPU_SPECS[name]
        plan = forecast.plan_for(checked, DeviceLimits(name, gpus.usable_bytes(card.memory_gb * 1e9), card), gpu=True)
        if not plan.fits:
            small.append(f"  {name:8}{price:>9.2f}  does not fit ({plan.peak.total / 1e9:.1f} GB)")
            continue
        training = forecast.run_seconds(checked, plan, card)
        gpu = (training / 3600 + prices.start_minutes / 60) * price
        start, time = f"{prices.start_minutes:g} min", forecast.format_hours(training)
        everything = gpu + once + prices.keeping
        rows.append((everything, f"  {name:8}{price:>9.2f}{start:>8}{time:>13}{gpu:>9.2f}{everything:>9.2f}"))
    return [*found, *(row for _, row in sorted(rows)), *small]
