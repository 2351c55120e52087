package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

const testNode = "node-1"

func TestCollect(t *testing.T) {
	failure := apierrors.NewInternalError(errors.New("no leader"))
	tests := []struct {
		name     string
		pods     []*v1.Pod
		prepare  func(t *testing.T, s store, api *fake.Clientset)
		released []string
		wantErr  string
	}{
		{name: "every pod is there", pods: []*v1.Pod{pod("a", testNode), pod("b", testNode)}},
		{name: "a pod is gone", pods: []*v1.Pod{pod("b", testNode)}, released: []string{"ns/a"}},
		{name: "all pods are gone", released: []string{"ns/a", "ns/b"}},
		{
			name: "any phase keeps the address, and so does a deletion under way",
			pods: []*v1.Pod{
				with(pod("a", testNode), func(p *v1.Pod) { p.Status.Phase = v1.PodFailed }),
				with(pod("b", testNode), func(p *v1.Pod) {
					p.Status.Phase = v1.PodSucceeded
					p.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
					p.Finalizers = []string{"example.com/wait"}
				}),
			},
		},
		{
			name: "another UID of the same name keeps the address",
			pods: []*v1.Pod{with(pod("a", testNode), func(p *v1.Pod) { p.UID = "new" }), pod("b", testNode)},
		},
		{
			name:     "a pod of the same name elsewhere does not",
			pods:     []*v1.Pod{pod("a", "node-2"), pod("b", testNode)},
			released: []string{"ns/a"},
		},
		{
			name:     "nor does one in another namespace",
			pods:     []*v1.Pod{with(pod("a", testNode), func(p *v1.Pod) { p.Namespace = "other" }), pod("b", testNode)},
			released: []string{"ns/a"},
		},
		{
			name: "an old list is not believed",
			pods: []*v1.Pod{pod("a", testNode)},
			prepare: func(_ *testing.T, _ store, api *fake.Clientset) {
				api.PrependReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
					return true, &v1.PodList{}, nil
				})
			},
			released: []string{"ns/b"},
		},
		{
			name: "the list fails",
			prepare: func(_ *testing.T, _ store, api *fake.Clientset) {
				api.PrependReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
					return true, nil, failure
				})
			},
			wantErr: "list the pods of node node-1",
		},
		{
			name: "one question by name fails, the other says not found",
			prepare: func(_ *testing.T, _ store, api *fake.Clientset) {
				api.PrependReactor("get", "pods", func(action clienttesting.Action) (bool, runtime.Object, error) {
					return action.(clienttesting.GetAction).GetName() == "b", nil, failure
				})
			},
			wantErr: "get pod ns/b",
		},
		{
			name: "a pod that comes after the records were read is not looked for",
			pods: []*v1.Pod{pod("a", testNode)},
			prepare: func(t *testing.T, s store, api *fake.Clientset) {
				api.PrependReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
					change(t, s, "ns/new", "c-new")
					return true, &v1.PodList{}, nil // not in the list yet
				})
			},
			released: []string{"ns/b"},
		},
		{
			name: "a record that a new sandbox took over is kept",
			prepare: func(t *testing.T, s store, api *fake.Clientset) {
				api.PrependReactor("get", "pods", func(action clienttesting.Action) (bool, runtime.Object, error) {
					if action.(clienttesting.GetAction).GetName() == "a" {
						change(t, s, "ns/a", "c-new")
					}
					return false, nil, nil
				})
			},
			released: []string{"ns/b"},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := store{dir: t.TempDir()}
			change(t, s, "ns/a", "c-a")
			change(t, s, "ns/b", "c-b")
			api := newAPI(test.pods)
			if test.prepare != nil {
				test.prepare(t, s, api)
			}
			var log bytes.Buffer
			c := collector{store: s, pods: api.CoreV1(), node: testNode, log: slog.New(slog.NewJSONHandler(&log, nil))}
			err := c.collect(t.Context())
			if (err != nil) != (test.wantErr != "") || err != nil && !strings.Contains(err.Error(), test.wantErr) {
				t.Fatalf("error %v, want %q", err, test.wantErr)
			}

			p, err := s.load()
			if err != nil {
				t.Fatal(err)
			}
			for pod, address := range map[string]string{"ns/a": "10.112.1.2", "ns/b": "10.112.1.3"} {
				want := slices.Contains(test.released, pod)
				if _, kept := p.Records[pod]; kept == want {
					t.Errorf("%s: kept %t, want released %t", pod, kept, want)
				}
				if free := slices.Contains(p.IPv4.Free, netip.MustParseAddr(address)); free != want {
					t.Errorf("%s: free %t, want %t", address, free, want)
				}
				if logged := strings.Contains(log.String(), `"msg":"released","pod":"`+pod+`","addresses":["`+address+`"]}`); logged != want {
					t.Errorf("%s: log %s, want a line %t", pod, log.String(), want)
				}
			}
			if lines := strings.Count(log.String(), "\n"); lines != len(test.released) {
				t.Errorf("%d lines of log, want %d:\n%s", lines, len(test.released), log.String())
			}
		})
	}
}

func TestCollectWithoutState(t *testing.T) {
	api := newAPI(nil)
	c := collector{store: store{dir: t.TempDir()}, pods: api.CoreV1(), node: testNode}
	if err := c.collect(t.Context()); err != nil {
		t.Error(err)
	}
	if len(api.Actions()) != 0 {
		t.Errorf("asked the API server %v about nothing", api.Actions())
	}
}

func TestRunGoesOnAfterAnErrorAndEndsWithTheContext(t *testing.T) {
	s := store{dir: t.TempDir()}
	change(t, s, "ns/a", "c-a")
	api := newAPI(nil)
	rounds := 0
	again := make(chan struct{})
	api.PrependReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
		if rounds++; rounds == 1 {
			return true, nil, errors.New("down")
		}
		close(again) // once: after this round there is no record to ask for
		return true, &v1.PodList{}, nil
	})
	var log bytes.Buffer
	c := collector{store: s, pods: api.CoreV1(), node: testNode, log: slog.New(slog.NewJSONHandler(&log, nil))}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.run(ctx, time.Millisecond)
	}()
	<-again
	waitFor(t, "the release", func() bool {
		p, err := s.load()
		return err == nil && len(p.Records) == 0
	})
	cancel()
	<-done
	if text := log.String(); !strings.Contains(text, `"level":"ERROR","msg":"nothing released","error":"list the pods of node node-1: down"`) ||
		!strings.Contains(text, `"msg":"released"`) {
		t.Errorf("log:\n%s", text)
	}
}

// newAPI returns an API server that, unlike the bare fake, heeds spec.nodeName in a list.
func newAPI(pods []*v1.Pod) *fake.Clientset {
	objects := make([]runtime.Object, len(pods))
	for i := range pods {
		objects[i] = pods[i]
	}
	api := fake.NewClientset(objects...)
	api.PrependReactor("list", "pods", func(action clienttesting.Action) (bool, runtime.Object, error) {
		node, ok := action.(clienttesting.ListAction).GetListRestrictions().Fields.RequiresExactMatch("spec.nodeName")
		if !ok {
			return true, nil, errors.New("a list without a node")
		}
		list := &v1.PodList{}
		for _, pod := range pods {
			if pod.Spec.NodeName == node {
				list.Items = append(list.Items, *pod)
			}
		}
		return true, list, nil
	})
	return api
}

func pod(name, node string) *v1.Pod {
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: "old"},
		Spec:       v1.PodSpec{NodeName: node},
		Status:     v1.PodStatus{Phase: v1.PodRunning},
	}
}

func with(pod *v1.Pod, edit func(*v1.Pod)) *v1.Pod {
	edit(pod)
	return pod
}

// change gives the pod an address in the state, for the sandbox.
func change(t *testing.T, s store, pod, container string) {
	t.Helper()
	unlock, err := s.lock()
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	p, err := s.loadFor(config{Subnet: netip.MustParsePrefix("10.112.1.0/24"), Subnet6: netip.MustParsePrefix("fd00:112:1::/112"), PoolSize: 8})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.take(pod, families{ipv4: true}, container, "", time.Unix(1, 0).UTC()); err != nil {
		t.Fatal(err)
	}
	if err := s.save(p); err != nil {
		t.Fatal(err)
	}
}
