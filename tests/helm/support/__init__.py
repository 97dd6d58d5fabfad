"""What the chart's tests share: real Helm 3 and 4, upstream's schemas and rules, pods inside custom resources."""
