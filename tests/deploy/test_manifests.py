"""The Kubernetes manifests: they render, are valid, and their numbers fit each other and the server's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "deploy" / "k8s"
ALL_OVERLAYS = sorted(path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml"))
OVERLAYS = [name for name in ALL_OVERLAYS if name != "ray"]  # those of pods that Kubernetes itself starts
# What KubeRay's operator knows, by the Go types of its API ray.io/v1; the others of its fields are left out here.
RAY_SERVICE = {"serveConfigV2": str, "rayClusterConfig": dict}
RAY_CLUSTER = {"rayVersion": str, "enableInTreeAutoscaling": bool, "headGroupSpec": dict, "workerGroupSpecs": list}
RAY_HEAD = {"rayStartParams": dict, "template": dict}
RAY_WORKERS = {**RAY_HEAD, "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
NAME = "app.kubernetes.io/name"

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl (Debian's package kubernetes-client) is not installed")


def rendered(overlay: str) -> dict[str, Any]:
    """What `kubectl kustomize` makes, by kind and name."""
    done = subprocess.run(["kubectl", "kustomize", str(K8S / "overlays" / overlay)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no word of what will go away
    return {f"{item['kind']}/{item['metadata']['name']}": item for item in yaml.safe_load_all(done.stdout)}


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> dict[str, Any]:
    return rendered(request.param)


def test_there_is_an_overlay_for_each_kind_of_machine() -> None:
    assert {"cpu", "gpu", "gpu4"} <= set(OVERLAYS)


@needs_kubectl
def test_every_selector_finds_the_pods_and_no_others(manifests: dict[str, Any]) -> None:
    pod = manifests["Deployment/octavo"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Deployment/octavo"]["spec"]["selector"]["matchLabels"].items() <= pod.items()
    for key in ("Service/octavo", "Service/octavo-replicas"):
        assert manifests[key]["spec"]["selector"] == {NAME: "octavo"}
        assert manifests[key]["spec"]["ports"][0]["targetPort"] == "http"
    assert manifests["PodDisruptionBudget/octavo"]["spec"]["selector"]["matchLabels"] == {NAME: "octavo"}
    policy = manifests["NetworkPolicy/octavo"]["spec"]
    assert policy["podSelector"]["matchLabels"] == {NAME: "octavo"}
    peers = [peer for rule in policy["ingress"] for peer in rule["from"]]
    assert [peer["podSelector"]["matchLabels"] for peer in peers] == [{"octavo.ai/gateway": "true"}, {NAME: "prometheus"}]
    assert all(rule["ports"] == [{"protocol": "TCP", "port": 30000}] for rule in policy["ingress"])
    target = manifests["HorizontalPodAutoscaler/octavo"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", "octavo")


@needs_kubectl
def test_a_pod_is_closed_and_has_what_it_writes_to(manifests: dict[str, Any]) -> None:
    pod = manifests["Deployment/octavo"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["enableServiceLinks"] is False  # other Services' variables are no flags
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts) == {"/cache", "/tmp", "/dev/shm"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(volumes) == set(mounts.values())
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    for volume in volumes.values():
        assert len(volume) == 2, volume  # its name, and one kind
        if "persistentVolumeClaim" in volume:
            assert f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}" in manifests
    (settings,) = [source["configMapRef"]["name"] for source in container["envFrom"]]
    assert f"ConfigMap/{settings}" in manifests
    assert all(variable["valueFrom"]["secretKeyRef"]["optional"] for variable in container["env"])


@needs_kubectl
def test_the_pods_grace_covers_the_drain(manifests: dict[str, Any]) -> None:
    pod = manifests["Deployment/octavo"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (settings,) = [item["data"] for key, item in manifests.items() if key.startswith("ConfigMap/")]
    before_stop = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] >= before_stop + int(settings["OCTAVO_SHUTDOWN_TIMEOUT"]) + 10
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert container["readinessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/ready"
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] >= 1800
    assert {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")} == {"http"}


@needs_kubectl
def test_the_settings_are_flags_of_the_server(manifests: dict[str, Any]) -> None:
    from octavo.serve.environment import flags_from

    (settings,) = [item["data"] for key, item in manifests.items() if key.startswith("ConfigMap/")]
    flags = flags_from(settings, [])
    assert f"--model-path={settings['MODEL_PATH']}" in flags
    assert len(flags) == len(settings)


@needs_kubectl
def test_gpus_and_ranks_are_as_many() -> None:
    for overlay in ("gpu", "gpu4"):
        found = rendered(overlay)
        (settings,) = [item["data"] for key, item in found.items() if key.startswith("ConfigMap/")]
        (container,) = found["Deployment/octavo"]["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(settings.get("TP_SIZE", 1))
        assert container["image"] == "octavo:sm90"


@needs_kubectl
@pytest.mark.parametrize("overlay", ALL_OVERLAYS)
def test_the_newest_schema_takes_it(overlay: str, tmp_path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    items = rendered(overlay)
    if (service := items.pop("RayService/octavo", None)) is not None:
        cluster = service["spec"]["rayClusterConfig"]
        for number, group in enumerate([cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]):
            items[f"Pod/{number}"] = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
    for item in items.values():
        validate.validate(item, validate.latest_version(), strict=True)


def test_custom_resources_have_the_fields_that_their_operators_know() -> None:
    monitor = yaml.safe_load((K8S / "components" / "prometheus-operator" / "servicemonitor.yaml").read_text())
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "ServiceMonitor")
    services = {item["metadata"]["name"]: item for item in yaml.safe_load_all((K8S / "base" / "service.yaml").read_text())}
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    found = [name for name, item in services.items() if wanted <= item["metadata"].get("labels", {}).items()]
    assert found == ["octavo-replicas"]  # through one service alone, or every pod would be scraped twice
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == services["octavo-replicas"]["spec"]["ports"][0]["name"]


@needs_kubectl
def test_a_rayservice_has_the_fields_that_its_operator_knows() -> None:
    items = rendered("ray")
    service = items["RayService/octavo"]
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    groups = cluster["workerGroupSpecs"]
    pairs = [(service["spec"], RAY_SERVICE), (cluster, RAY_CLUSTER), (cluster["headGroupSpec"], RAY_HEAD)]
    for content, known in [*pairs, *((group, RAY_WORKERS) for group in groups)]:
        assert {name: type(value) for name, value in content.items()} == known
        assert all(isinstance(value, str) for value in content.get("rayStartParams", {}).values())
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    (group,) = groups
    assert application["args"]["max_replicas"] == group["maxReplicas"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    pod = group["template"]["spec"]
    (worker,) = pod["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == application["args"]["num_gpus"]
    assert int(worker["resources"]["requests"]["cpu"]) >= application["args"]["num_cpus"]
    assert pod["terminationGracePeriodSeconds"] >= application["args"]["shutdown_timeout"] + 10
    assert pod["enableServiceLinks"] is cluster["headGroupSpec"]["template"]["spec"]["enableServiceLinks"] is False
    assert serve["http_options"]["port"] in [port["containerPort"] for port in head["ports"]]
    for container in (head, worker):
        assert all(variable["valueFrom"]["secretKeyRef"]["optional"] for variable in container["env"])
        assert "local_raylet_healthz" in container["livenessProbe"]["exec"]["command"][-1]
    assert f":{serve['http_options']['port']}/-/healthz" in worker["readinessProbe"]["exec"]["command"][-1]
    assert "/-/healthz" not in head["readinessProbe"]["exec"]["command"][-1]  # the application is given to a head that is ready
    for volume in pod["volumes"]:
        if "persistentVolumeClaim" in volume:
            assert f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}" in items


def test_what_is_scaled_on_has_a_rule_in_the_adapter() -> None:
    folder = K8S / "components" / "autoscaling"
    rules = {rule["name"]["as"]: rule for rule in yaml.safe_load((folder / "adapter.yaml").read_text())["rules"]["custom"]}
    for file in ("hpa.yaml", "hpa-gpu.yaml"):
        for metric in yaml.safe_load((folder / file).read_text())["spec"]["metrics"]:
            assert metric["pods"]["metric"]["name"] in rules
    for rule in rules.values():
        series = rule["seriesQuery"].partition("{")[0]
        assert f"{series}{{<<.LabelMatchers>>}}" in rule["metricsQuery"]
