"""What NetworkPolicies let through, by the API's own definition: policies add up, and a selected pod denies what none of them allows."""

from typing import Any

from .charts import NAMESPACE, Object


def allows(policies: list[Object], source: Object, target: Object, port: int) -> bool:
    """Whether a TCP connection from pod to pod passes: out of the source, and into the target."""
    return _passes(policies, "egress", source, target, port) and _passes(policies, "ingress", target, source, port)


def allows_out(policies: list[Object], source: Object, port: int) -> bool:
    """Whether the pod may open a TCP connection to some address outside."""
    return any(
        _port(rule, port) and _outside(rule)
        for policy in _of(policies, source, "egress")
        for rule in policy["spec"].get("egress", [])
    )


def _outside(rule: dict[str, Any]) -> bool:
    return "to" not in rule or any("ipBlock" in peer for peer in rule["to"])


def _passes(policies: list[Object], direction: str, pod: Object, other: Object, port: int) -> bool:
    selecting = _of(policies, pod, direction)
    if not selecting:
        return True
    key = "to" if direction == "egress" else "from"
    return any(
        _port(rule, port) and _peer(rule.get(key), other) for policy in selecting for rule in policy["spec"].get(direction, [])
    )


def _of(policies: list[Object], pod: Object, direction: str) -> list[Object]:
    return [
        policy
        for policy in policies
        if direction.capitalize() in policy["spec"]["policyTypes"]
        and pod["metadata"]["namespace"] == policy["metadata"]["namespace"]
        and selects(policy["spec"]["podSelector"], pod["metadata"]["labels"])
    ]


def _port(rule: dict[str, Any], port: int) -> bool:
    return "ports" not in rule or any(entry["port"] == port and entry.get("protocol", "TCP") == "TCP" for entry in rule["ports"])


def _peer(peers: list[dict[str, Any]] | None, other: Object) -> bool:
    return peers is None or any(_matches(peer, other) for peer in peers)


def _matches(peer: dict[str, Any], other: Object) -> bool:
    if "ipBlock" in peer:
        # Addresses of pods are not in these tests; a block of everything holds them.
        return bool(peer["ipBlock"]["cidr"] == "0.0.0.0/0")
    namespace = other["metadata"]["namespace"]
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}):
            return False
    elif namespace != NAMESPACE:
        return False
    return selects(peer.get("podSelector", {}), other["metadata"]["labels"])


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector matches; an empty one matches all."""
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for expression in selector.get("matchExpressions", []):
        value, values = labels.get(expression["key"]), expression.get("values", [])
        match expression["operator"]:
            case "In" if value not in values:
                return False
            case "NotIn" if value in values:
                return False
            case "Exists" if value is None:
                return False
            case "DoesNotExist" if value is not None:
                return False
    return True
