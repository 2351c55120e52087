package main

import (
	"bytes"
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"text/template"
)

//go:embed manifests
var manifests embed.FS

// component is one daemon of the cluster.
type component struct {
	name string
	path string // of the binary
	args []string
	// ready names a URL that answers 200, or a file that exists, as soon as the component works.
	ready string
	ports []int // TCP ports it listens on
}

// stages lists the daemons in the order they are started; those of one stage start together.
func stages(cfg config) [][]component {
	pki := cfg.path("pki")
	kubeconfig := func(name string) string { return filepath.Join(pki, name+".kubeconfig") }
	crt := func(name string) string { return filepath.Join(pki, name+".crt") }
	key := func(name string) string { return filepath.Join(pki, name+".key") }
	return [][]component{
		{
			{
				name: "etcd", path: cfg.binary("etcd"), ports: []int{2379, 2380},
				args: []string{
					"--name=" + nodeName, "--data-dir=" + dataDir + "/etcd",
					"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
					"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
					"--initial-cluster=" + nodeName + "=http://127.0.0.1:2380",
				},
				ready: "http://127.0.0.1:2379/readyz",
			},
			{
				name: "containerd", path: cfg.containerdBinary("containerd"),
				args:  []string{"--config", cfg.path("config/containerd.toml")},
				ready: runtimeSock,
			},
		},
		{
			{
				name: "kube-apiserver", path: cfg.binary("kube-apiserver"), ports: []int{6443},
				args: []string{
					"--etcd-servers=http://127.0.0.1:2379",
					"--advertise-address=" + nodeIP, "--bind-address=" + nodeIP, "--secure-port=6443",
					"--service-cluster-ip-range=" + serviceNet,
					"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
					"--client-ca-file=" + crt("ca"),
					"--tls-cert-file=" + crt("apiserver"), "--tls-private-key-file=" + key("apiserver"),
					"--kubelet-certificate-authority=" + crt("ca"),
					"--kubelet-client-certificate=" + crt("apiserver-kubelet-client"), "--kubelet-client-key=" + key("apiserver-kubelet-client"),
					"--kubelet-preferred-address-types=InternalIP",
					"--service-account-issuer=https://kubernetes.default.svc",
					"--service-account-key-file=" + key("service-account"), "--service-account-signing-key-file=" + key("service-account"),
					"--audit-policy-file=" + cfg.path("config/audit-policy.yaml"),
					"--audit-log-path=" + cfg.path("audit.log"),
					// Written before the response is sent: whoever reads the log after a request finds it there.
					"--audit-log-mode=blocking-strict",
				},
				ready: "https://" + nodeIP + ":6443/readyz",
			},
		},
		{
			{
				name: "kube-controller-manager", path: cfg.binary("kube-controller-manager"), ports: []int{10257},
				args: []string{
					"--kubeconfig=" + kubeconfig("controller-manager"), "--bind-address=127.0.0.1", "--leader-elect=false",
					"--use-service-account-credentials=true", "--service-account-private-key-file=" + key("service-account"),
					"--root-ca-file=" + crt("ca"),
					"--cluster-signing-cert-file=", "--cluster-signing-key-file=",
					// Tests stop the kubelet, and the pods of its node are to stay ready meanwhile.
					"--node-monitor-grace-period=5m",
				},
				ready: "https://127.0.0.1:10257/healthz",
			},
			{
				name: "kube-scheduler", path: cfg.binary("kube-scheduler"), ports: []int{10259},
				args:  []string{"--kubeconfig=" + kubeconfig("scheduler"), "--bind-address=127.0.0.1", "--leader-elect=false"},
				ready: "https://127.0.0.1:10259/healthz",
			},
			{
				name: "kubelet", path: cfg.binary("kubelet"), ports: []int{10248, 10250},
				args: []string{
					"--kubeconfig=" + kubeconfig("kubelet"), "--config=" + cfg.path("config/kubelet.yaml"),
					"--root-dir=" + dataDir + "/kubelet", "--cert-dir=" + dataDir + "/kubelet/pki",
					"--hostname-override=" + nodeName, "--node-ip=" + nodeIP,
				},
				ready: "http://127.0.0.1:10248/healthz",
			},
			{
				name: "kube-proxy", path: cfg.binary("kube-proxy"), ports: []int{10249, 10256},
				args:  []string{"--config=" + cfg.path("config/kube-proxy.yaml")},
				ready: "http://127.0.0.1:10256/livez",
			},
			{
				name: "eni-sim-gc", path: cfg.binary("eni-sim"),
				args: []string{
					"gc", "--kubeconfig=" + cfg.kubeconfig(), "--state-dir=" + dataDir + "/eni-sim",
					"--node=" + nodeName, "--period=" + cfg.gcPeriod.String(),
				},
			},
		},
	}
}

// writeConfiguration writes certificates, kubeconfigs and the configuration files of all components.
func writeConfiguration(cfg config) error {
	pki := cfg.path("pki")
	ca, err := newAuthority(pki)
	if err != nil {
		return err
	}
	for _, cert := range []struct {
		name, user string
		groups     []string
		hosts      []string
	}{
		{"apiserver", "kube-apiserver", nil, []string{nodeIP, apiService, "127.0.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}},
		{"apiserver-kubelet-client", "kube-apiserver-kubelet-client", []string{"system:masters"}, nil},
		{"admin", "kubernetes-admin", []string{"system:masters"}, nil},
		{"controller-manager", "system:kube-controller-manager", nil, nil},
		{"scheduler", "system:kube-scheduler", nil, nil},
		{"kubelet", "system:node:" + nodeName, []string{"system:nodes"}, []string{nodeIP, nodeName}},
		{"kube-proxy", "system:kube-proxy", nil, nil},
	} {
		if err := ca.issue(cert.name, cert.user, cert.groups, cert.hosts...); err != nil {
			return err
		}
		if len(cert.hosts) > 0 && cert.name == "apiserver" || cert.name == "apiserver-kubelet-client" {
			continue
		}
		content, err := ca.kubeconfig(cert.name)
		if err != nil {
			return err
		}
		target := filepath.Join(pki, cert.name+".kubeconfig")
		if cert.name == "admin" {
			target = cfg.kubeconfig()
		}
		if err := os.WriteFile(target, content, 0o600); err != nil {
			return err
		}
	}
	if _, err := ca.newKey("service-account"); err != nil {
		return err
	}

	values := map[string]any{
		"Run": runDir, "Data": dataDir, "PKI": pki, "PauseImage": pauseImage, "CgroupName": cgroupName,
		"NodeName": nodeName, "NodeIP": nodeIP, "PodNet": podNet, "PodNet6": podNet6, "PoolSize": cfg.poolSize,
		"Shim": "", // containerd finds Debian's
	}
	if cfg.containerd != "" {
		values["Shim"] = cfg.binary("containerd-shim-runc-v2")
	}
	for name, target := range map[string]string{
		"containerd.toml":   cfg.path("config/containerd.toml"),
		"kubelet.yaml":      cfg.path("config/kubelet.yaml"),
		"kube-proxy.yaml":   cfg.path("config/kube-proxy.yaml"),
		"audit-policy.yaml": cfg.path("config/audit-policy.yaml"),
		"cni.conflist":      dataDir + "/cni/net.d/10-eni-sim.conflist",
	} {
		if err := render(name, target, values); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"eni-sim": cfg.binary("eni-sim"), "loopback": loopbackPlugin} {
		if err := os.MkdirAll(dataDir+"/cni/bin", 0o755); err != nil {
			return err
		}
		if err := relink(target, filepath.Join(dataDir, "cni/bin", name)); err != nil {
			return err
		}
	}
	return nil
}

// render writes the manifest called name to target with its values filled in.
func render(name, target string, values map[string]any) error {
	t, err := template.ParseFS(manifests, "manifests/"+name)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := t.Option("missingkey=error").Execute(&out, values); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	return os.WriteFile(target, out.Bytes(), 0o644)
}
