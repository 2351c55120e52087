#!/bin/bash
# Writes changes.log.gz beside itself: changes of the guard as people type them, on an API server without anything else.
# usage: changes.sh DIR, with etcd, kube-apiserver, kubectl and helm in it
set -euo pipefail
bin=$(realpath "$1") here=$(realpath "$(dirname "$0")") dir=$(mktemp -d)
cd "$dir"
trap 'kill -KILL $(jobs -p); rm -rf "$dir"' EXIT
# await repeats a command until it succeeds.
await() {
	for _ in {1..150}; do
		"$@" && return
		sleep 0.2
	done
	return 1
}

openssl genrsa -out account.key 2048
echo 'token,kubernetes-admin,admin,"system:masters"' >tokens.csv
"$bin/etcd" --data-dir=etcd --listen-client-urls=http://127.0.0.1:33790 --advertise-client-urls=http://127.0.0.1:33790 --listen-peer-urls=http://127.0.0.1:33791 \
	--initial-advertise-peer-urls=http://127.0.0.1:33791 --initial-cluster=default=http://127.0.0.1:33791 &>etcd.out &
await curl -fs http://127.0.0.1:33790/health
"$bin/kube-apiserver" --etcd-servers=http://127.0.0.1:33790 --bind-address=127.0.0.1 --advertise-address=10.9.9.9 --secure-port=36443 --cert-dir=certs \
	--service-cluster-ip-range=10.222.0.0/24 --endpoint-reconciler-type=none --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
	--disable-admission-plugins=ServiceAccount --service-account-issuer=https://kubernetes.default.svc --service-account-key-file=account.key \
	--service-account-signing-key-file=account.key --token-auth-file=tokens.csv --audit-policy-file="$here/../../../hack/cluster/manifests/audit-policy.yaml" \
	--audit-log-path=audit.log --audit-log-mode=blocking-strict &>apiserver.out &
kubectl() { "$bin/kubectl" --server=https://127.0.0.1:36443 --insecure-skip-tls-verify --token=token "$@"; }
# force removes a pod by force; it may be refused.
force() { kubectl delete pod -n shop --grace-period=0 --force --wait=false "$@" || true; }
# edit is `kubectl edit`, with sed for an editor.
edit() { EDITOR="sed -i '$1'" kubectl edit validatingwebhookconfiguration eni-guard; }
# inForce waits until the API server goes by what was changed: it lets a pod go.
inForce() { await kubectl delete pod -n shop "$1" --grace-period=0 --force --dry-run=server; }

await kubectl get --raw=/readyz
kubectl create namespace eni-guard
kubectl create namespace shop
"$bin/helm" template eni-guard "$here/../../../charts/eni-guard" --namespace eni-guard --kube-version 1.36.3 --no-hooks | kubectl apply --server-side -f -
kubectl create -f - <<<'{"kind": "Node", "apiVersion": "v1", "metadata": {"name": "node-1"}}'
for pod in web-0 web-1 web-2 web-3; do
	kubectl create -f - <<<'{"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "'$pod'", "namespace": "shop"}, "spec": {"nodeName": "node-1", "containers": [{"name": "app", "image": "x"}]}}'
done
force web-0 # no webhook runs
force web-0 --as=system:node:node-1 --as-group=system:nodes
kubectl create rolebinding oncall -n shop --clusterrole=eni-guard-override --user=jo
kubectl create -f - <<<'{"kind": "RoleBinding", "apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"generateName": "more-", "namespace": "shop"},
	"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "eni-guard-override"}, "subjects": [{"kind": "User", "name": "mo"}]}'
kubectl create clusterrole ops --verb='*' --resource='*.eni-guard.io'
kubectl create clusterrole reader --verb=get --resource=pods
edit 's/- "off"$/- deny/'
kubectl patch validatingwebhookconfiguration eni-guard --type=json -p '[{"op": "replace", "path": "/webhooks/0/timeoutSeconds", "value": 5},
	{"op": "add", "path": "/webhooks/0/matchConditions/-", "value": {"name": "never", "expression": "false"}}]'
inForce web-1
force web-1
edit '/^webhooks:/,$d'
inForce web-2
force web-2
kubectl label namespace shop eni-guard.io/mode=off
kubectl label namespace shop eni-guard.io/mode-
kubectl scale deployment -n eni-guard eni-guard-webhook --replicas=0
kubectl taint node node-1 node.kubernetes.io/out-of-service=x:NoExecute
kubectl taint node node-1 node.kubernetes.io/out-of-service:NoExecute-
kubectl annotate pod -n shop web-3 eni-guard.io/allow-force-delete=fire
kubectl delete validatingwebhookconfiguration eni-guard-failing-open
grep -v '"username":"system:apiserver"' audit.log | gzip -9n >"$here/changes.log.gz"
