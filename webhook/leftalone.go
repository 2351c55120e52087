package webhook

import (
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
)

// LeftAlone returns the reason for which the guard has nothing to say about a removal, if there is one that request and pod
// show; nodes and modes of namespaces are not looked at. It is for who judges a removal that the guard was not asked about. The
// pod may be as it was before the request, or as the request has marked it; grace is in seconds, nil if none was asked for.
func LeftAlone(path Path, pod *corev1.Pod, grace *int64, user authenticationv1.UserInfo) (Reason, bool) {
	return exempt(&removal{path: path, pod: pod, grace: grace, user: user}, surroundings{})
}
