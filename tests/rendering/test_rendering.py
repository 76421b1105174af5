"""Compares the renderer with geometry derived by hand and with sphere tracing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.rendering import KINDS, Camera, Scene, depth_and_index, look_at, raycast, render

draw = jax.jit(render, static_argnames=("height", "width"))
measure = jax.jit(depth_and_index, static_argnames=("height", "width"))

SOLIDS = tuple(kind for kind in KINDS if kind != "plane")
UPRIGHT = (1.0, 0.0, 0.0, 0.0)
ALONG_X = (2**-0.5, 0.0, 2**-0.5, 0.0)  # turns the local z to the world's x


def scene_of(*primitives, checker=None):
    """Returns a scene of (kind, position, rotation, size, color) tuples."""
    kind, *arrays = zip(*primitives, strict=True)
    position, rotation, size, color = (jnp.asarray(a, jnp.float32) for a in arrays)
    return Scene(
        kind=kind, position=position, rotation=rotation, size=size, color=color, checker=checker
    )


def one(kind, position, size, rotation=UPRIGHT, color=(1.0, 0.0, 0.0)):
    return scene_of((kind, position, rotation, size, color))


def front_camera(fovy=90.0):
    """At the origin, looking along the world's -z, x to the right, y up; at 90 degrees a ray's
    slopes are in [-1, 1]."""
    return Camera(position=jnp.zeros(3), rotation=jnp.eye(3), fovy=jnp.float32(fovy))


def slopes(size):
    """Returns right and up components of the rays of `front_camera()` at depth 1, [size, size]."""
    along = (np.arange(size) + 0.5) * 2 / size - 1
    return np.broadcast_to(along, (size, size)), np.broadcast_to(-along[:, None], (size, size))


def look(scene, camera=None, size=101):
    camera = front_camera() if camera is None else camera
    distance, index = measure(scene, camera, height=size, width=size)
    return np.asarray(distance), np.asarray(index)


def random_scene(kinds, batch, seed, spread=0.7):
    """Returns primitives around the origin, and cameras 3 m away that look at it."""
    rng = np.random.default_rng(seed)
    shape = (*batch, len(kinds))
    rotation = rng.normal(size=(*shape, 4))
    rotation /= np.linalg.norm(rotation, axis=-1, keepdims=True)
    position = rng.normal(size=(*batch, 3))
    position *= 3 / np.linalg.norm(position, axis=-1, keepdims=True)
    scene = Scene(
        kind=tuple(kinds),
        position=jnp.asarray(rng.uniform(-spread, spread, (*shape, 3)), jnp.float32),
        rotation=jnp.asarray(rotation, jnp.float32),
        size=jnp.asarray(rng.uniform(0.1, 0.5, (*shape, 3)), jnp.float32),
        color=jnp.asarray(rng.uniform(0, 1, (*shape, 3)), jnp.float32),
    )
    return scene, look_at(position, np.zeros(3))


# Geometry by hand.


def test_sphere_covers_the_cone_of_its_tangents():
    # Radius 1, distance 5: tangents at asin(1 / 5), slope 1 / sqrt(25 - 1) = 0.2041.
    distance, index = look(one("sphere", (0, 0, -5), (1, 0, 0)))
    x, y = slopes(101)
    np.testing.assert_array_equal(index == 0, x**2 + y**2 < 1 / 24)
    # At 101 pixels for a slope of 2 the radius is 0.2041 * 101 / 2 = 10.3 pixels: 21 in the middle.
    assert (index[50] == 0).sum() == 21
    assert distance[50, 50] == pytest.approx(4.0, abs=1e-5)
    assert np.isinf(distance[index < 0]).all()


def test_box_covers_its_front_face():
    # Front face at z = -4 + 0.25, half extents 1 and 0.5: slopes below 1 / 3.75 and 0.5 / 3.75.
    distance, index = look(one("box", (0, 0, -4), (1, 0.5, 0.25)))
    x, y = slopes(101)
    face = (np.abs(x) < 1 / 3.75) & (np.abs(y) < 0.5 / 3.75)
    np.testing.assert_array_equal(index == 0, face)
    length = np.sqrt(1 + x**2 + y**2)
    np.testing.assert_allclose(distance[face], 3.75 * length[face], rtol=1e-5)


def test_turned_box_shows_two_faces_that_meet_at_its_edge():
    # Turned by 45 degrees about y, half extent 1, center at 4: the nearest edge is vertical, at
    # x = 0 and depth 4 - sqrt(2); the outer edges are at x = +-sqrt(2) and depth 4.
    turn = (np.cos(np.pi / 8), 0, np.sin(np.pi / 8), 0)
    distance, index = look(one("box", (0, 0, -4), (1, 1, 1), turn))
    assert distance[50, 50] == pytest.approx(4 - 2**0.5, abs=1e-5)
    x, _ = slopes(101)
    np.testing.assert_array_equal(index[50] == 0, np.abs(x[50]) < 2**0.5 / 4)


@pytest.mark.parametrize("kind", ["capsule", "cylinder"])
def test_lying_capsule_and_cylinder_reach_to_their_ends(kind):
    # Radius 0.5, half length 1 along x, center 5 away.
    _, index = look(one(kind, (0, 0, -5), (0.5, 1, 0), ALONG_X), size=401)
    x, y = slopes(401)
    # Middle column, both: a circle of radius 0.5 seen from 5: slope 0.5 / sqrt(25 - 0.25).
    np.testing.assert_array_equal(index[:, 200] == 0, np.abs(y[:, 200]) < 0.5 / 24.75**0.5)
    if kind == "capsule":
        # Outer tangent of the circle of radius 0.5 around (1, -5).
        end = np.tan(np.arctan(1 / 5) + np.arcsin(0.5 / 26**0.5))
    else:
        # The corner that stands out most is the far one's silhouette: (1, -4.5) is nearer.
        end = 1 / 4.5
    np.testing.assert_array_equal(index[200] == 0, np.abs(x[200]) < end)


def test_capsule_and_cylinder_seen_end_on():
    # Radius 0.5, half length 1 along the line of sight, center 5 away: the cylinder's end is a disc
    # at depth 4, slope below 0.5 / 4; the capsule's a sphere around depth 4, nearest point 3.5.
    x, y = slopes(101)
    distance, index = look(one("cylinder", (0, 0, -5), (0.5, 1, 0)))
    disc = x**2 + y**2 < (0.5 / 4) ** 2
    np.testing.assert_array_equal(index == 0, disc)
    np.testing.assert_allclose(distance[disc], 4 * np.sqrt(1 + x**2 + y**2)[disc], rtol=1e-5)
    distance, index = look(one("capsule", (0, 0, -5), (0.5, 1, 0)))
    np.testing.assert_array_equal(index == 0, x**2 + y**2 < 0.25 / (16 - 0.25))
    assert distance[50, 50] == pytest.approx(3.5, abs=1e-5)


def test_plane_depth_at_every_pixel():
    # A level camera 2 above an endless plane, looking along +y: right is x, up is z. A ray with
    # slope s < 0 upward meets the plane at depth 2 / -s.
    camera = look_at((0.0, 0.0, 2.0), (0.0, 1.0, 2.0), fovy=90.0)
    distance, index = look(one("plane", (0, 0, 0), (0, 0, 1)), camera, size=100)
    x, y = slopes(100)
    np.testing.assert_array_equal(index == 0, y < 0)
    below = y < 0
    expected = (2 / -y * np.sqrt(1 + x**2 + y**2))[below]
    np.testing.assert_allclose(distance[below], expected, rtol=1e-4)


def test_plane_with_extents_ends_there():
    # Looking straight down from 4 at half extents 1 and 2: slopes below 1 / 4 and 2 / 4. With the
    # sight along -z the picture's top is the world's y, its right the world's x.
    camera = look_at((0.0, 0.0, 4.0), (0.0, 0.0, 0.0), fovy=90.0)
    _, index = look(one("plane", (0, 0, 0), (1, 2, 1)), camera)
    x, y = slopes(101)
    np.testing.assert_array_equal(index == 0, (np.abs(x) < 0.25) & (np.abs(y) < 0.5))


# Any pose, against an independent method.


def signed_distance(kind, point, size):
    """Returns the distance from local points [N, 3] to the surface, negative inside (Quilez)."""
    if kind == "sphere":
        return np.linalg.norm(point, axis=-1) - size[0]
    if kind == "capsule":
        point = point.copy()
        point[:, 2] -= np.clip(point[:, 2], -size[1], size[1])
        return np.linalg.norm(point, axis=-1) - size[0]
    if kind == "cylinder":
        radial = np.linalg.norm(point[:, :2], axis=-1) - size[0]
        outside = np.stack([radial, np.abs(point[:, 2]) - size[1]], axis=-1)
    elif kind == "box":
        outside = np.abs(point) - size
    else:  # a plate
        outside = np.abs(point) - np.asarray([size[0], size[1], 0.0])
    return np.linalg.norm(np.maximum(outside, 0), axis=-1) + np.minimum(outside.max(-1), 0)


def quaternion_matrix(q):
    """Returns the matrix whose columns are the images of the axes under v -> q v q*."""
    w, v = q[0], q[1:]
    return np.stack(
        [e + 2 * w * np.cross(v, e) + 2 * np.cross(v, np.cross(v, e)) for e in np.eye(3)], axis=1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_random_poses_agree_with_sphere_tracing(kind):
    size = 40
    scene, camera = random_scene((kind,), (4,), seed=KINDS.index(kind))
    distance, index = look(scene, camera, size)
    seen = 0
    for b in range(4):
        frame = quaternion_matrix(np.asarray(scene.rotation[b, 0], np.float64))
        view = np.asarray(camera.rotation[b], np.float64)
        x, y = (s.ravel() * np.tan(np.deg2rad(45.0 / 2)) for s in slopes(size))
        ray = np.stack([x, y, -np.ones_like(x)], axis=-1) @ view.T
        ray = ray / np.linalg.norm(ray, axis=-1, keepdims=True) @ frame
        origin = np.asarray(camera.position[b] - scene.position[b, 0], np.float64) @ frame
        extent = np.asarray(scene.size[b, 0], np.float64)
        traveled, nearest = np.zeros(len(ray)), np.full(len(ray), np.inf)
        for _ in range(400):
            gap = signed_distance(kind, origin + traveled[:, None] * ray, extent)
            nearest = np.minimum(nearest, gap)
            traveled = np.minimum(traveled + np.maximum(gap, 0), 10)
        hit, miss = nearest < 1e-5, nearest > 1e-3  # what grazes is neither
        if kind == "plane" and origin[2] < 0:
            hit, miss = np.zeros_like(hit), np.ones_like(miss)  # seen from behind
        flat_index, flat_distance = index[b].ravel(), distance[b].ravel()
        np.testing.assert_array_equal(flat_index[miss], -1)
        np.testing.assert_array_equal(flat_index[hit], 0)
        inner = hit & (traveled < 9)
        np.testing.assert_allclose(flat_distance[inner], traveled[inner], atol=2e-3)
        seen += hit.sum()
    assert seen > 100  # or nothing has been compared


# Order, orientation, batches.


def test_the_nearest_primitive_wins_whatever_the_order():
    back = ("box", (0, 0, -6), UPRIGHT, (2, 2, 0.5), (0, 0, 1))
    front = ("sphere", (0, 0, -4), UPRIGHT, (0.5, 0, 0), (1, 0, 0))
    for primitives, sphere in (((back, front), 1), ((front, back), 0)):
        distance, index = look(scene_of(*primitives))
        assert index[50, 50] == sphere and index[50, 35] == 1 - sphere and index[0, 0] == -1
        assert distance[50, 50] == pytest.approx(3.5, abs=1e-5)
        image = np.asarray(draw(scene_of(*primitives), front_camera(), height=101, width=101))
        assert image[50, 50, 0] > 100 and image[50, 50, 2] == 0
        assert image[50, 35, 2] > 100 and image[50, 35, 0] == 0
        np.testing.assert_array_equal(image[0, 0], raycast.BACKGROUND)


def test_look_at_puts_right_to_the_right_and_up_to_the_top():
    # From -y towards +y: the world's x is to the right, its z up.
    camera = look_at((0.0, -5.0, 0.0), (0.0, 0.0, 0.0))
    scene = scene_of(
        ("sphere", (1, 0, 0), UPRIGHT, (0.3, 0, 0), (1, 0, 0)),
        ("sphere", (0, 0, 1), UPRIGHT, (0.3, 0, 0), (0, 1, 0)),
    )
    red, green, _ = np.moveaxis(
        np.asarray(draw(scene, camera, height=60, width=60)).astype(int), -1, 0
    )
    rows, columns = np.nonzero(red - green > 50)
    assert columns.min() > 30 and rows.mean() == pytest.approx(29.5, abs=0.5)
    rows, columns = np.nonzero(green - red > 50)
    assert rows.max() < 30 and columns.mean() == pytest.approx(29.5, abs=0.5)


def test_look_at_is_a_rotation_that_aims_at_the_target_in_every_direction():
    directions = np.concatenate([np.eye(3), -np.eye(3), [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]])
    camera = look_at(np.ones(3), 1 + directions)
    rotation = np.asarray(camera.rotation)
    np.testing.assert_allclose(
        rotation.swapaxes(-1, -2) @ rotation, np.tile(np.eye(3), (8, 1, 1)), atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0, atol=1e-5)
    aims = directions / np.maximum(np.linalg.norm(directions, axis=-1, keepdims=True), 1e-9)
    aims[-1] = [0, 0, -1]  # a target at the camera stands for straight below
    np.testing.assert_allclose(-rotation[..., 2], aims, atol=1e-6)
    # Straight down with z up: the top of the picture is the world's y.
    np.testing.assert_allclose(rotation[5][:, 1], [0, 1, 0], atol=1e-6)


def test_tracking_camera_keeps_the_target_in_the_middle():
    target = jnp.asarray([[0.0, 0.0, 0.0], [4.0, -3.0, 1.0]])
    camera = look_at(target + jnp.asarray([1.0, -3.0, 2.0]), target)
    scene = Scene(
        kind=("sphere",),
        position=target[:, None],
        rotation=jnp.tile(jnp.asarray(UPRIGHT), (2, 1, 1)),
        size=jnp.full((2, 1, 3), 0.3),
        color=jnp.ones((2, 1, 3)),
    )
    _, index = look(scene, camera, size=41)
    np.testing.assert_array_equal(index[0], index[1])
    rows, columns = np.nonzero(index[0] == 0)
    assert rows.mean() == pytest.approx(20) and columns.mean() == pytest.approx(20)


def test_wide_picture_adds_columns_on_both_sides():
    scene = one("sphere", (0.5, 0.2, -5), (1, 0, 0))
    square = draw(scene, front_camera(), height=40, width=40)
    wide = draw(scene, front_camera(), height=40, width=60)
    np.testing.assert_array_equal(wide[:, 10:-10], square)


def test_batch_equals_loop_and_vmap():
    scene, camera = random_scene(KINDS * 2, (2, 3), seed=7)
    sized = functools.partial(draw, height=24, width=20)
    images = sized(scene, camera)
    assert images.shape == (2, 3, 24, 20, 3) and images.dtype == jnp.uint8
    assert np.asarray(images).std() > 10  # not a blank
    np.testing.assert_allclose(
        np.asarray(jax.vmap(jax.vmap(sized))(scene, camera), int), np.asarray(images, int), atol=1
    )
    for i in np.ndindex(2, 3):
        alone = sized(jax.tree.map(lambda x: x[i], scene), jax.tree.map(lambda x: x[i], camera))
        # Another program may round otherwise: one step of brightness, or a pixel on an outline.
        difference = np.abs(np.asarray(alone, int) - np.asarray(images[i], int)).max(-1)
        assert (difference > 1).mean() < 0.005


def test_one_camera_serves_a_batch_of_scenes_and_one_scene_a_batch_of_cameras():
    scene, camera = random_scene(("sphere", "box"), (3,), seed=1)
    first = jax.tree.map(lambda x: x[0], camera)
    images = draw(scene, first, height=16, width=16)
    assert images.shape == (3, 16, 16, 3)
    batched = draw(scene, camera, height=16, width=16)
    np.testing.assert_allclose(np.asarray(images[0], int), np.asarray(batched[0], int), atol=1)
    alone = jax.tree.map(lambda x: x[0], scene)
    distance, index = measure(alone, camera, height=16, width=16)
    assert distance.shape == index.shape == (3, 16, 16)
    colored = alone.replace(color=scene.color)
    images = draw(colored, first, height=16, width=16)
    single = draw(alone.replace(color=scene.color[1]), first, height=16, width=16)
    np.testing.assert_allclose(np.asarray(images[1], int), np.asarray(single, int), atol=1)


def test_a_missed_sphere_computes_no_nan():
    # JAX_DEBUG_NANS runs a function one operation at a time, and stops at the first NaN.
    with jax.debug_nans(True), jax.disable_jit():
        _, index = look(*random_scene(("sphere", "plane"), (), seed=0), size=9)
    assert 0 < (index == 0).mean() < 1  # Some rays hit the sphere, and others miss it.


def test_empty_scene_is_background():
    scene = Scene(
        kind=(),
        position=jnp.zeros((0, 3)),
        rotation=jnp.zeros((0, 4)),
        size=jnp.zeros((0, 3)),
        color=jnp.zeros((0, 3)),
    )
    image = draw(scene, front_camera(), height=4, width=4)
    np.testing.assert_array_equal(image, np.broadcast_to(raycast.BACKGROUND, (4, 4, 3)))


# Light and color.


def test_three_faces_of_a_box_differ_and_each_is_nearly_uniform():
    camera = look_at((30.0, -30.0, 30.0), (0.0, 0.0, 0.0), fovy=5.0)
    scene = one("box", (0, 0, 0), (1, 1, 1), color=(1, 1, 1))
    image = np.asarray(draw(scene, camera, height=64, width=64))[..., 0].astype(int)
    values = np.unique(image[look(scene, camera, 64)[1] == 0])
    # Nearly parallel rays, so three narrow groups of values with gaps between them.
    assert (np.diff(values) > 8).sum() == 2


@pytest.mark.parametrize("kind", SOLIDS)
def test_brightness_is_that_of_the_surface_normal(kind):
    # The normal is the gradient of the signed distance at the point that is hit.
    scene, camera = random_scene((kind,), (3,), seed=11)
    scene = scene.replace(color=jnp.ones((3, 1, 3)))
    size = 48
    image = np.asarray(draw(scene, camera, height=size, width=size))[..., 0] / 255
    distance, index = look(scene, camera, size)
    for b in range(3):
        frame = quaternion_matrix(np.asarray(scene.rotation[b, 0], np.float64))
        x, y = (s * np.tan(np.deg2rad(45.0 / 2)) for s in slopes(size))
        ray = np.stack([x, y, -np.ones_like(x)], axis=-1) @ np.asarray(camera.rotation[b]).T
        ray = (ray / np.linalg.norm(ray, axis=-1, keepdims=True))[index[b] == 0]
        point = np.asarray(camera.position[b]) + distance[b][index[b] == 0][:, None] * ray
        local = (point - np.asarray(scene.position[b, 0])) @ frame
        extent = np.asarray(scene.size[b, 0], np.float64)
        gap = functools.partial(signed_distance, kind, size=extent)
        step = 1e-4 * np.eye(3)
        normal = np.stack([(gap(local + s) - gap(local - s)) / 2e-4 for s in step], -1) @ frame.T
        light = (
            raycast.AMBIENT
            + raycast.HEADLIGHT * -(normal * ray).sum(-1)
            + raycast.SUN * np.maximum(normal @ raycast.SUN_DIRECTION, 0)
        )
        # Edges have no gradient; rounding to 8 bits is 0.002.
        close = np.abs(image[b][index[b] == 0] - light) < 0.01
        assert close.mean() > 0.95


def test_color_keeps_its_hue():
    image = draw(
        one("sphere", (0, 0, -5), (2, 0, 0), color=(0.8, 0.4, 0.2)),
        front_camera(),
        height=9,
        width=9,
    )
    red, green, blue = np.asarray(image[4, 4], int)
    # 255 * (0.8, 0.4, 0.2) = (204, 102, 51), times one brightness.
    assert green == pytest.approx(red / 2, abs=1) and blue == pytest.approx(red / 4, abs=1)


def test_rounding_never_carries_into_the_next_channel():
    # 300 m away and 0.1 m large: float32 knows the discriminant to some 10 % of itself only.
    image = draw(one("sphere", (0, 0, -300), (0.1, 0, 0)), front_camera(0.06), height=65, width=65)
    red = np.asarray(image)[16:-16, 16:-16]
    assert (red[..., 0] > 80).any() and not red[red[..., 0] != raycast.BACKGROUND[0]][:, 1:].any()


def test_checker_alternates_near_and_fades_far_away():
    # From 4 above, slopes in [-1, 1]: 8 m on 80 pixels, squares of 1 m are 10 pixels.
    scene = one("plane", (0, 0, 0), (0, 0, 1), color=(1, 1, 1))
    camera = look_at((0.0, 0.0, 4.0), (0.0, 0.0, 0.0), fovy=90.0)
    plain = np.asarray(draw(scene, camera, height=80, width=80))[..., 0].astype(float)
    squares = scene.replace(checker=jnp.ones(1))
    image = np.asarray(draw(squares, camera, height=80, width=80))[..., 0]
    centers = (image / plain)[5::10, 5::10]
    light = np.add.outer(np.arange(8), np.arange(8)) % 2 == 1  # [0, 1] x [0, 1] is row 3, column 4
    np.testing.assert_allclose(centers[light], 1.0, atol=0.02)
    np.testing.assert_allclose(centers[~light], 0.7, atol=0.02)
    # Squares much smaller than a pixel: their mean, 0.85, everywhere.
    fine = draw(scene.replace(checker=jnp.full(1, 0.01)), camera, height=80, width=80)
    np.testing.assert_allclose(np.asarray(fine)[..., 0] / plain, 0.85, atol=0.02)
    none = draw(scene.replace(checker=jnp.zeros(1)), camera, height=80, width=80)
    np.testing.assert_array_equal(np.asarray(none)[..., 0], plain)


# Degenerate cases: each draws what it should, and is finite.


def assert_draws_nothing(scene, camera=None, size=64):
    camera = front_camera() if camera is None else camera
    distance, index = look(scene, camera, size)
    np.testing.assert_array_equal(index, -1)
    assert np.isinf(distance).all()
    image = np.asarray(draw(scene, camera, height=size, width=size))
    np.testing.assert_array_equal(image, np.broadcast_to(raycast.BACKGROUND, image.shape))


@pytest.mark.parametrize("kind", SOLIDS)
def test_size_zero_draws_nothing(kind):
    # Many, because it is by rounding that a ray would hit one; and some in the middle, which the
    # central ray of an odd number of pixels goes through, upright and turned.
    scene, camera = random_scene((kind,), (30,), seed=3, spread=0.4)
    scene = scene.replace(
        position=scene.position.at[:10].set(0.0),
        rotation=scene.rotation.at[5:15].set(jnp.asarray(UPRIGHT)),
        size=jnp.zeros_like(scene.size),
    )
    for at in (camera, front_camera()):
        assert_draws_nothing(scene, at, size=65)


def test_size_zero_hides_one_primitive_of_a_batch_only():
    scene = one("sphere", (0, 0, -3), (1, 0, 0))
    sizes = jnp.asarray([[[1.0, 0, 0]], [[0.0, 0, 0]]])
    _, index = look(scene.replace(size=sizes), size=16)
    assert (index[0] == 0).any() and (index[1] == -1).all()


@pytest.mark.parametrize("rotation", [UPRIGHT, ALONG_X, (0.5, 0.1, 0.7, 0.5)])
@pytest.mark.parametrize("kind", SOLIDS)
def test_camera_inside_looks_through(kind, rotation):
    rotation = np.asarray(rotation) / np.linalg.norm(rotation)
    for position in ((0, 0, 0), (0.1, -0.2, 0.05)):
        assert_draws_nothing(one(kind, position, (0.5, 0.5, 0.5), rotation), size=65)
    # What is behind the wall is seen.
    wall = (kind, (0, 0, 0), rotation, (0.5, 0.5, 0.5), (1, 0, 0))
    behind = ("sphere", (0, 0, -5), UPRIGHT, (1, 0, 0), (0, 1, 0))
    assert look(scene_of(wall, behind), size=65)[1][32, 32] == 1


@pytest.mark.parametrize("kind", SOLIDS)
def test_behind_the_camera_or_too_far_draws_nothing(kind):
    assert_draws_nothing(one(kind, (0, 0, 3), (1, 1, 1)))
    assert_draws_nothing(one(kind, (0, 0, -2 * raycast.FAR), (50, 50, 50)))


def test_plane_from_behind_or_edge_on_draws_nothing():
    assert_draws_nothing(one("plane", (0, 0, -3), (0, 0, 1), (0.0, 1.0, 0.0, 0.0)))
    # Its normal is the world's x, and the camera lies in it.
    assert_draws_nothing(one("plane", (0, 0, 0), (0, 0, 1), ALONG_X), size=65)


@pytest.mark.parametrize("turn", [UPRIGHT, ALONG_X, (2**-0.5, 2**-0.5, 0.0, 0.0)])
@pytest.mark.parametrize("kind", ["box", "cylinder", "capsule"])
def test_rays_along_faces_and_axes(kind, turn):
    # With an odd size, the middle row and column hold rays with a component of exactly 0.
    _, index = look(one(kind, (0, 0, -3), (0.5, 0.5, 0.5), turn), size=65)
    assert index[32, 32] == 0
    # Beside the primitive by exactly its extent and by more: the middle ray passes.
    for offset in (0.6, 1.2):
        scene = one(kind, (offset, 0, -3), (0.5, 0.5, 0.5), UPRIGHT)
        distance, index = look(scene, size=65)
        assert index[32, 32] == -1 and not np.isnan(distance).any()


def test_non_finite_pose_draws_nothing():
    for kind in SOLIDS:
        assert_draws_nothing(one(kind, (np.nan, 0, -3), (0.5, 0.5, 0.5)))


# Programs.


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    scene, camera = random_scene(KINDS, (2,), seed=0)
    scene = scene.replace(checker=jnp.ones((2, len(KINDS))))
    for program in (draw, measure):
        exported = jax.export.export(program, platforms=[platform])(
            scene, camera, height=16, width=16
        )
        assert exported.platforms == (platform,)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about XLA's CPU backend")
def test_compiles_to_one_pass_over_the_pixels():
    # The speed hangs on it: the packed picture is the only image-sized intermediate result.
    scene, camera = random_scene(KINDS * 2, (8,), seed=0)
    program = draw.lower(scene, camera, height=24, width=40)
    entry = program.compile().as_text().split("ENTRY")[1]
    results = [line.split(" = ")[1].split("{")[0] for line in entry.splitlines() if " = " in line]
    assert [r for r in results if "24,40" in r] == ["s32[8,24,40]", "u8[8,24,40,3]"]


# Bad input.


def test_bad_input_is_refused_by_name():
    scene, camera = random_scene(("sphere", "box"), (), seed=0)
    sized = functools.partial(render, height=8, width=8)
    with pytest.raises(ValueError, match="'cone'.*capsule"):
        sized(scene.replace(kind=("cone", "box")), camera)
    with pytest.raises(ValueError, match=r"scene.size .*\(2, 2\).*\(2, 3\)"):
        sized(scene.replace(size=scene.size[:, :2]), camera)
    with pytest.raises(ValueError, match="scene.position"):
        sized(scene.replace(kind=("sphere",)), camera)
    with pytest.raises(ValueError, match="camera.rotation"):
        sized(scene, camera.replace(rotation=jnp.ones(4)))
    with pytest.raises(ValueError, match="width is 0"):
        draw(scene, camera, height=8, width=0)
