"""Times as people read them."""


def duration(seconds: float) -> str:
    """Seconds as people read them: 41.3 s, 12 min 5 s, 3 h 20 min, 2 d 5 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"
