//go:build conformance

package webhook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// TestConformanceWithAnOutdatedCache holds what the guard, and `eni-guard audit`, build on: where the API server's cache lags behind etcd, it asks
// about the outdated copy of the pod, and then about the pod as it is. What it does is what the last answer says; the audit log has the first.
func TestConformanceWithAnOutdatedCache(t *testing.T) {
	slow := &laggard{}
	s := startAPIServer(t, slow.stand(t))
	const refuse = "example.com/refuse"
	s.calls.judge = func(c call) *admissionv1.AdmissionResponse {
		if c.configuration != failClosed || c.err != nil {
			return nil
		}
		if c.pod.Annotations[refuse] != "" {
			return &admissionv1.AdmissionResponse{
				Result:           &metav1.Status{Code: http.StatusConflict, Message: "because it is to be refused"},
				AuditAnnotations: map[string]string{"decision": "refused"},
			}
		}
		return &admissionv1.AdmissionResponse{Allowed: true, AuditAnnotations: map[string]string{"decision": "let through"}}
	}
	s.prepare(t)
	s.grantRights(t)
	s.install(t)
	s.waitForAdmission(t)
	byLabel := func(pod *corev1.Pod) request {
		return mergePatch(pod, fmt.Sprintf(`{"metadata":{"labels":{%q:"true"}}}`, IgnoreLabel))
	}
	gone := func(_ *corev1.Pod, err error) bool { return apierrors.IsNotFound(err) }
	labelled := func(pod *corev1.Pod, _ error) bool { return pod.Labels[IgnoreLabel] == "true" }
	const denial = `admission webhook "force-delete.eni-guard.io" denied the request: because it is to be refused`
	for _, c := range []struct {
		name     string
		before   string // the annotation refuse of the pod
		meantime string // what the cache does not know of: annotations
		by       user
		request  func(*corev1.Pod) request
		done     func(*corev1.Pod, error) bool
		code     int
		message  string
		// asked are the annotations of the pods that the webhook was asked about, while it was not overridden.
		asked    string
		audited  string
		override string
	}{
		// A removal has two steps, which begin with the copy each.
		{"delete, refused at first", "yes", refuse + `":null`, alice, deletion(PathDelete, 0), gone, http.StatusOK, "", `"yes" "" "yes" "" `, "refused", ""},
		{"delete, refused in the end", "", refuse + `":"yes"`, alice, deletion(PathDelete, 0), gone, http.StatusConflict, denial, `"" "yes" `, "let through", ""},
		{"delete, overridden in the end", "yes", OverrideAnnotation + `":"fire"`, bob, deletion(PathDelete, 0), gone, http.StatusOK, "", `"yes" "yes" `, "refused", "fire"},
		{"label, refused at first", "yes", refuse + `":null`, alice, byLabel, labelled, http.StatusOK, "", `"yes" "" `, "refused", ""},
		{"label, refused in the end", "", refuse + `":"yes"`, alice, byLabel, labelled, http.StatusConflict, denial, `"" "yes" `, "let through", ""},
		{"label, overridden in the end", "yes", OverrideAnnotation + `":"fire"`, bob, byLabel, labelled, http.StatusOK, "", `"yes" `, "refused", "fire"},
	} {
		t.Run(c.name, func(t *testing.T) {
			pod := storedPod(callsNamespace, strings.NewReplacer(" ", "-", ",", "").Replace(c.name), func(p *corev1.Pod) {
				if c.before != "" {
					p.Annotations = map[string]string{refuse: c.before}
				}
			})
			s.store(t, pod)
			await(t, "the pod to be in the cache", func() bool { return s.cached(t, pod) != nil })
			version := s.cached(t, pod).ResourceVersion
			slow.changes.Lock()
			defer slow.changes.Unlock()
			if code, err := s.send(t.Context(), mergePatch(pod, `{"metadata":{"annotations":{"`+c.meantime+`}}}`)); code != http.StatusOK {
				t.Fatal(code, err)
			}
			if now := s.cached(t, pod); now.ResourceVersion != version {
				t.Fatalf("the cache is not out of date: it has version %s after %s", now.ResourceVersion, version)
			}
			r := c.request(pod)
			r.user = c.by.name
			code, err := s.send(t.Context(), r)
			if code != c.code {
				t.Errorf("answered with %d (%v), not %d", code, err, c.code)
			}
			if done := c.done(s.CoreV1().Pods(pod.Namespace).Get(t.Context(), pod.Name, metav1.GetOptions{})); done != (c.code == http.StatusOK) {
				t.Errorf("done: %t", done)
			}
			asked := ""
			for _, call := range s.calls.of(pod, failClosed) {
				asked += fmt.Sprintf("%q ", call.pod.Annotations[refuse])
			}
			if asked != c.asked {
				t.Errorf("asked about pods annotated %s, not %s", asked, c.asked)
			}
			var event auditEvent
			await(t, "the decision to be in the audit log", func() bool {
				for _, e := range s.audited(t) {
					if e.ObjectRef.Name == pod.Name && e.Annotations[webhookDecision] != "" {
						event = e
					}
				}
				return event.Annotations != nil
			})
			if got := event.Annotations[webhookDecision]; got != c.audited {
				t.Errorf("the audit log says %q, not %q", got, c.audited)
			}
			if got := event.Annotations[policyReason]; got != c.override {
				t.Errorf("the audit log has the override %q, not %q", got, c.override)
			}
			if got := event.ResponseStatus; got.Code != c.code || got.Message != c.message {
				t.Errorf("the audit log has the answer %+v", got)
			}
		})
	}
}

// mergePatch makes the request to change a pod as a JSON merge patch says.
func mergePatch(pod *corev1.Pod, patch string) request {
	return request{verb: http.MethodPatch, path: podPath(pod), contentType: string(types.MergePatchType), body: rawJSON(patch)}
}

// rawJSON is sent as it is.
type rawJSON string

func (j rawJSON) MarshalJSON() ([]byte, error) { return []byte(j), nil }

// cached returns the pod as the API server's cache has it; nil if it has none.
func (s *apiServer) cached(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	list, err := s.CoreV1().Pods(pod.Namespace).List(t.Context(), metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range list.Items {
		if list.Items[i].Name == pod.Name {
			return &list.Items[i]
		}
	}
	return nil
}

// laggard stands between an API server and its etcd. While changes is locked it holds back the answers of all watches, and nothing else.
type laggard struct {
	changes sync.RWMutex
	etcd    *grpc.ClientConn
}

// stand puts it there, before they start.
func (l *laggard) stand(t *testing.T) func(*envtest.Environment) {
	t.Helper()
	return func(environment *envtest.Environment) {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		environment.ControlPlane.GetAPIServer().Configure().Set("etcd-servers", "http://"+listener.Addr().String())
		l.etcd, err = grpc.NewClient("passthrough:///etcd", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.ForceCodecV2(unread{}), grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32)),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				// Only known after the start, which the API server's comes after.
				return (&net.Dialer{}).DialContext(ctx, "tcp", environment.ControlPlane.Etcd.URL.Host)
			}))
		if err != nil {
			t.Fatal(err)
		}
		server := grpc.NewServer(grpc.ForceServerCodecV2(unread{}), grpc.UnknownServiceHandler(l.pass), grpc.MaxRecvMsgSize(math.MaxInt32))
		go func() { _ = server.Serve(listener) }()
		t.Cleanup(func() {
			server.Stop()
			_ = l.etcd.Close()
		})
	}
}

// pass passes one call on, and its answers back.
func (l *laggard) pass(_ any, in grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(in)
	ctx := in.Context()
	if given, ok := metadata.FromIncomingContext(ctx); ok {
		ctx = metadata.NewOutgoingContext(ctx, given)
	}
	out, err := l.etcd.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return err
	}
	go func() {
		for {
			var message []byte
			if in.RecvMsg(&message) != nil {
				_ = out.CloseSend()
				return
			}
			if out.SendMsg(&message) != nil {
				return
			}
		}
	}()
	for {
		var message []byte
		if err := out.RecvMsg(&message); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if err := l.answer(in, method, &message); err != nil {
			return err
		}
	}
}

// answer sends an answer on its way back.
func (l *laggard) answer(in grpc.ServerStream, method string, message *[]byte) error {
	if method == "/etcdserverpb.Watch/Watch" {
		l.changes.RLock()
		defer l.changes.RUnlock()
	}
	return in.SendMsg(message)
}

// unread is the codec of messages that nobody reads on their way.
type unread struct{}

func (unread) Marshal(message any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*message.(*[]byte))}, nil
}

func (unread) Unmarshal(data mem.BufferSlice, message any) error {
	*message.(*[]byte) = data.Materialize()
	return nil
}

func (unread) Name() string { return "proto" }
